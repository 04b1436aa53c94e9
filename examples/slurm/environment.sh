# What every node's processes see. README.md in this folder has a row for each name.
# Under Slurm launch.sh reads this file; for a plain torchrun: source examples/slurm/environment.sh on every node.

# torchrun. Without the first, workers that are started again meet the store of their dead predecessors.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270 # seconds to save in after SIGTERM; less than --signal=TERM@300
export OMP_NUM_THREADS=8                  # cores of the node / GPUs of the node

# CUDA and memory.
export CUDA_DEVICE_MAX_CONNECTIONS=1
export PYTORCH_ALLOC_CONF=expandable_segments:True

# Collectives: say what is wrong, and leave a record of the last calls of every rank when one hangs.
export NCCL_DEBUG=WARN
export TORCH_FR_BUFFER_SIZE=20000
export TORCH_NCCL_DUMP_ON_TIMEOUT=1

# What only you know about your network. `ip -br address` and `ibstat -l` list the names.
# export NCCL_SOCKET_IFNAME=bond0
# export GLOO_SOCKET_IFNAME=bond0
# export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3

# Files: compiled kernels on the node's own disk, nothing from the network.
export TRITON_CACHE_DIR=/tmp/boreal-triton-$USER
export HF_HUB_OFFLINE=1
