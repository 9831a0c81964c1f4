#!/bin/bash
# Figure 1 as a job array, a cell of the grid for each task: sbatch --array=1-36 paper/slurm.sh
# (python paper/figures.py 1 --dry-run | wc -l tells the number of cells). A task that is preempted
# saves on SIGTERM and is queued again; one that ran out of time goes on when it is submitted again;
# a cell that has finished ends at once. python paper/figures.py 1 --draw then draws.
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-task=1
#SBATCH --mem=16G
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
exec srun python paper/figures.py 1 --cell "$SLURM_ARRAY_TASK_ID" --jobs 1
