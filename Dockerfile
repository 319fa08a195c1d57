# docker build -t sparse-fcmae .                        for NVIDIA GPUs, and CPUs too
# docker build -t sparse-fcmae --build-arg TORCH_INDEX=ADDRESS .     for CPUs alone: PyTorch's index of CPU builds
# docker run --rm --gpus all --shm-size 2g -v $PWD:/work sparse-fcmae pretrain --data IMAGES --out runs/first --resume auto
FROM python:3.12-slim

# g++ builds the CPU's kernels; Triton needs a compiler too, when a GPU's kernels are first used
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

# torch first, as its layer is the largest and changes the least
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"

COPY . /source
ARG EXTRAS=finetune,jpeg,medical,microscopy,plots,remote,tensorboard
RUN pip install --no-cache-dir "/source[$EXTRAS]" && rm -rf /source && sparse-fcmae info

# what is written here lasts as long as the volume that is mounted
WORKDIR /work
ENTRYPOINT ["sparse-fcmae"]
