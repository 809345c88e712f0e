// A TVM module that holds CUDA machine code made elsewhere, so that a machine without a GPU or driver can export it.
//
// TVM's own class for it lives in libtvm_runtime_cuda.so, which loads only beside NVIDIA's driver. Without that library
// TVM keeps the kernels as source (CUDAFallbackModuleNode). Both classes save the same bytes,
//     format: u64 length, text | functions: a table | code: u64 length, bytes
// so we take the fallback's and change the first and the last part. The CUDA runtime loads the result as its own.
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/reflection/registry.h>

#include <cstdint>
#include <cstring>
#include <string>

namespace {
namespace ffi = tvm::ffi;

class MachineCode : public ffi::ModuleObj {
 public:
  explicit MachineCode(std::string saved) : saved_(std::move(saved)) {}
  const char* kind() const final { return "cuda"; }
  int GetPropertyMask() const final { return ffi::Module::kBinarySerializable; }
  ffi::Optional<ffi::Function> GetFunction(const ffi::String& name) final {
    TVM_FFI_THROW(RuntimeError) << "CUDA kernels run from an exported library, not from the compiler: " << name;
    TVM_FFI_UNREACHABLE();
  }
  ffi::Bytes SaveToBytes() const final { return ffi::Bytes(saved_); }

 private:
  std::string saved_;
};

std::string WithLength(const std::string& part) {
  uint64_t size = part.size();
  return std::string(reinterpret_cast<const char*>(&size), sizeof(size)) + part;
}

ffi::Module MachineCodeOf(const ffi::Module& source_module, const ffi::Bytes& cubin) {
  ffi::Bytes kept = source_module->SaveToBytes();
  std::string saved(kept.data(), kept.size());
  ffi::String text = source_module->InspectSource("cuda");
  std::string head = WithLength("cuda"), tail = WithLength(std::string(text.data(), text.size()));
  if (saved.size() < head.size() + tail.size() || saved.compare(0, head.size(), head) != 0 ||
      saved.compare(saved.size() - tail.size(), tail.size(), tail) != 0) {
    TVM_FFI_THROW(RuntimeError) << "TVM saves CUDA source in another form than this project knows";
  }
  std::string functions = saved.substr(head.size(), saved.size() - head.size() - tail.size());
  std::string code(cubin.data(), cubin.size());
  return ffi::Module(ffi::make_object<MachineCode>(WithLength("cubin") + functions + WithLength(code)));
}

}  // namespace

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef().def("gpt_frontend.cuda_machine_code", MachineCodeOf);
}
