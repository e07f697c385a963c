#!/bin/bash
#SBATCH --job-name=bnn
#SBATCH --time=04:00:00
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --output=bnn-%j.log
#SBATCH --open-mode=append
#SBATCH --no-requeue
#
# A run that is longer than a job:   sbatch submit.sh bnn.toml
#
# bnn-driver reads the end of the job from Slurm, stops in time ([run] margin before it) and exits with 75; only then this script
# submits itself again, from the folder of the first submission, and the next job goes on where this one stopped.  0 (done) and every
# error end the chain, also 7: a job in which nothing could be finished.  Break it by hand with scancel, or with a file named STOP.
#
# The driver runs in the job's own shell, not under srun, so that the command of your oracle may be an srun of its own.
set -u
config=${1:-bnn.toml}
script=submit.sh # Slurm runs a copy of this file: the name by which it is submitted again, in $SLURM_SUBMIT_DIR

cd "${SLURM_SUBMIT_DIR:-.}" || exit 3
# module load ...; source /path/to/venv/bin/activate
bnn-driver run "$config"
code=$?

if [ "$code" -eq 75 ] && [ ! -e STOP ]; then
    sbatch "$script" "$config"
    exit
fi
exit "$code"
