"""Draw a run's curves: plot_run.py CHECKPOINT_FOLDER OUT.png"""

import sys

from boreal_megatron.train.plot import plot_losses

if __name__ == "__main__":
    plot_losses(sys.argv[1], sys.argv[2])
