#!/bin/sh
# What `docker run IMAGE ...` runs: a command of the project by its short name, or any other command.
set -eu

usage() {
    cat <<'END'
docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD/artifacts:/gpt-frontend/artifacts" IMAGE COMMAND [ARGUMENTS]

  train      python -m gpt.train              a corpus     -> artifacts/ckpt.pt
  export     python -m export.onnx            a checkpoint -> artifacts/model.onnx
  compile    python -m tvm_frontend.compile   an ONNX file -> artifacts/tvm-llvm-O3; --target cuda --arch sm_86
  bench      python -m bench                  all engines  -> artifacts/report.html
  generate   python -m gpt.generate           text from a checkpoint
  inspect    python -m tvm_frontend.inspect   the machine code of a model compiled for a GPU
  demo       make demo                        all of it
  smoke      is this image whole, and right on this machine?

Anything else is run as it is: torchrun, python -m bench.generate, bash. Without --gpus all of it runs on the CPU.
END
}

say_where() {
    gpu=$(python -c 'from tvm_frontend.cuda_toolchain import gpu_arch; print(gpu_arch() or "")')
    if [ -n "$gpu" ]; then
        echo "GPU: $gpu (to compile for it: compile --target cuda --arch $gpu)" >&2
    else
        echo "GPU: none is visible here, so this runs on the CPU (docker run --gpus all shows it NVIDIA's)" >&2
    fi
    if ! [ -w artifacts ]; then
        echo "artifacts: not writable for user $(id -u):$(id -g); make the folder before you mount it, and" \
            "start with --user \"\$(id -u):\$(id -g)\"" >&2
    fi
}

command=${1:-help}
[ $# -eq 0 ] || shift
case $command in
    train) say_where && exec python -m gpt.train "$@" ;;
    export) say_where && exec python -m export.onnx "$@" ;;
    compile) say_where && exec python -m tvm_frontend.compile "$@" ;;
    bench) say_where && exec python -m bench "$@" ;;
    generate) say_where && exec python -m gpt.generate "$@" ;;
    inspect) exec python -m tvm_frontend.inspect "$@" ;;
    demo) say_where && exec make demo "$@" ;;
    smoke) say_where && exec python /gpt-frontend/docker/smoke.py "$@" ;;
    help | --help | -h) usage ;;
    *) say_where && exec "$command" "$@" ;;
esac
