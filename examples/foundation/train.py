"""Trains the embedded model with mace's own trainer, then writes it in double precision.

    python train.py --work WORK --epochs 30 --model embedded.model

Reads WORK/{train,valid}.xyz, writes WORK/training/ and the model.  Interrupted, the same command goes on from the last
checkpoint; with a smaller --epochs it ends there and writes the best weights so far.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from ase.io import iread
from mace.cli import run_train
from mace.tools.scripts_utils import extract_config_mace_model

NAME = "embedded"
SEED = 7
FIRST_RATE, LAST_RATE = 0.01, 1.5e-4

ARCHITECTURE = {
    "model": "MACE",  # a ScaleShiftMACE without shift: isolated atoms have exactly their E0
    "num_interactions": 2,
    "num_channels": 48,
    "max_L": 0,
    "max_ell": 2,
    "correlation": 2,
    "r_max": 4.5,
    "num_radial_basis": 8,
    "num_cutoff_basis": 5,
    "interaction_first": "RealAgnosticInteractionBlock",
    "interaction": "RealAgnosticResidualInteractionBlock",
    "MLP_irreps": "16x0e",
    "scaling": "rms_forces_scaling",
}
OBJECTIVE = {
    "loss": "l1l2energyforces",  # mean |ΔE|/atom and mean |ΔF| of an atom: a few strained frames do not rule
    "energy_weight": 100.0,
    "forces_weight": 10.0,
    "energy_key": "REF_energy",
    "forces_key": "REF_forces",
}


def arguments(work: Path, epochs: int, batch: int) -> list[str]:
    """mace_run_train's command line; the learning rate falls geometrically from FIRST_RATE to LAST_RATE over the epochs."""
    gamma = (LAST_RATE / FIRST_RATE) ** (1.0 / max(1, epochs - 1))
    settings = {
        "name": NAME,
        "seed": SEED,
        "train_file": work / "train.xyz",
        "valid_file": work / "valid.xyz",
        "work_dir": work / "training",
        **ARCHITECTURE,
        **OBJECTIVE,
        "batch_size": batch,
        "valid_batch_size": 32,
        "lr": FIRST_RATE,
        "scheduler": "ExponentialLR",
        "lr_scheduler_gamma": gamma,
        "ema_decay": 0.999,
        "max_num_epochs": epochs,
        "default_dtype": "float32",
        "device": "cpu",
        "num_workers": 0,
        "plot": False,
        "E0s": isolated_atoms(work / "train.xyz"),
    }
    return ["mace_run_train", *(f"--{k}={v}" for k, v in settings.items()), "--ema", "--amsgrad", "--restart_latest"]


def isolated_atoms(path: Path) -> dict[int, float]:
    """E0s (eV) by atomic number: the frames of one atom at the head of the training file."""
    return {int(x.numbers[0]): float(x.info["REF_energy"]) for x in iread(path, ":4") if len(x) == 1}


def in_double_precision(trained: torch.nn.Module, atomic_energies: dict[int, float]) -> torch.nn.Module:
    """The same model built anew in float64 with the trained parameters.

    A cast would keep Clebsch-Gordan coefficients and E0s rounded to single precision.
    """
    torch.set_default_dtype(torch.float64)
    config = extract_config_mace_model(trained)
    if "error" in config:
        sys.exit(f"mace cannot describe the model: {config['error']}")
    model = type(trained)(**config)
    trained_weights = dict(trained.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(trained_weights[name])
        ordered = [atomic_energies[int(z)] for z in model.atomic_numbers]
        model.atomic_energies_fn.atomic_energies.copy_(torch.tensor([ordered], dtype=torch.float64))
    return model.to("cpu").eval()


def main() -> None:
    """Trains, then writes the model in double precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--model", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.argv = arguments(args.work, args.epochs, args.batch)
    run_train.main()
    trained = torch.load(args.work / "training" / f"{NAME}.model", map_location="cpu", weights_only=False)
    torch.save(in_double_precision(trained, isolated_atoms(args.work / "train.xyz")), args.model)
    print(f"wrote {args.model}: {args.model.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
