"""How easily is this very answer to this very image broken? A report under a stated threat model.

Pure, and light enough for a serving worker: torch and Pillow, nothing of training or evaluation. The command is apart,
in pmgaft.probe_command, so that its help need not load torch.
"""

from pmgaft.probe.certificate import Certificate, NoisyFeatures, certify, noisy_features
from pmgaft.probe.health import ZERO_GRADIENT_LIMIT
from pmgaft.probe.minimum import Nearest, nearest_adversarial
from pmgaft.probe.report import Check, Curve, MinEps, ProbeReport, TargetEps, Verdict
from pmgaft.probe.run import probe
from pmgaft.probe.settings import ProbeSettings, eps_text
from pmgaft.probe.survival import Survival, survivals, surviving_pixels
from pmgaft.probe.wording import Wordings, wordings

__all__ = [
    "ZERO_GRADIENT_LIMIT",
    "Certificate",
    "Check",
    "Curve",
    "MinEps",
    "Nearest",
    "NoisyFeatures",
    "ProbeReport",
    "ProbeSettings",
    "Survival",
    "TargetEps",
    "Verdict",
    "Wordings",
    "certify",
    "eps_text",
    "nearest_adversarial",
    "noisy_features",
    "probe",
    "survivals",
    "surviving_pixels",
    "wordings",
]
