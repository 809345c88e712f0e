/* Stands in for NVIDIA's driver where there is none: Relay's libtvm.so does not load without these names.
   Each answers CUDA_ERROR_NO_DEVICE of cuda.h. */

#define ABSENT(name)                                                                                                   \
    int name(void) { return 100; }

ABSENT(cuDeviceGetName)
ABSENT(cuFuncSetAttribute)
ABSENT(cuGetErrorName)
ABSENT(cuLaunchKernel)
ABSENT(cuMemsetD32_v2)
ABSENT(cuModuleGetFunction)
ABSENT(cuModuleGetGlobal_v2)
ABSENT(cuModuleLoadData)
ABSENT(cuModuleUnload)
