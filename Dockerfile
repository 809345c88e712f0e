# docker build -t gpt-frontend:cpu .
# The image without CUDA's libraries, for machines without a GPU; it still compiles for one. See docker/README.md.

# Debian or Ubuntu with Python 3.11 or 3.12.
ARG RUNTIME_IMAGE=ubuntu:24.04


FROM ${RUNTIME_IMAGE}
# g++ links what TVM compiles; with Python's headers, it is also what torch.compile needs.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /gpt-frontend
# Only what says what to install: a change of the source leaves this layer as it is.
COPY pyproject.toml constraints.txt ./
COPY docker/dependencies.py docker/
ARG EXTRAS=cuda,datasets,gpt2,quantize,tensorboard,tune
# Where a torch is to come from other than PyPI, whose torch brings CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv .venv \
    && .venv/bin/python docker/dependencies.py "${EXTRAS}" > /tmp/requirements.txt \
    && .venv/bin/python -m pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} \
        -c constraints.txt -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt

# Readable for all, whatever the checkout's modes are.
COPY --chmod=755 . .
# `make` looks at the time of `installed`: it is to find all of it installed.
RUN mkdir --mode 1777 artifacts /home/gpt \
    && .venv/bin/python -m compileall -q bench export gpt tvm_frontend \
    && touch .venv/installed
# Any user may run it (--user), also one without a name here: HOME is everyone's, and USER answers who asks for a name.
# RELAY_PYTHON: none, so that make demo installs nothing; the image has no environment for Relay.
ENV HOME=/home/gpt \
    RELAY_PYTHON= \
    USER=gpt \
    PATH=/gpt-frontend/.venv/bin:${PATH} \
    PYTHONPATH=/gpt-frontend \
    PYTHONUNBUFFERED=1
USER 10001:10001
ENTRYPOINT ["/gpt-frontend/docker/entrypoint.sh"]
CMD ["help"]
