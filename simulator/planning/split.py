"""Static splits of a GPU budget: so many workers prefill, so many decode, and of which kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.errors import ConfigError
from core.performance_profile import PerformanceProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Workers by role. With no prefill worker every worker prefills for itself: no disaggregation."""

    prefill_profile: PerformanceProfile
    num_prefill: int
    decode_profile: PerformanceProfile
    num_decode: int

    def __hash__(self) -> int:
        # Profiles are long to hash, and their names differ.
        return hash((self.prefill_profile.name, self.num_prefill, self.decode_profile.name, self.num_decode))

    @property
    def num_gpus(self) -> int:
        """GPUs it takes; a CPU worker counts as one."""
        return self.num_prefill * gpus_of(self.prefill_profile) + self.num_decode * gpus_of(
            self.decode_profile
        )

    @property
    def label(self) -> str:
        """Such as ``3P+5D``, with TP sizes where they are not 1: ``3P+2Dx2``."""
        decode = f"{self.num_decode}D{_tensor_parallel(self.decode_profile)}"
        prefill = _tensor_parallel(self.prefill_profile) if self.num_prefill else ""
        return f"{self.num_prefill}P{prefill}+{decode}"


def gpus_of(profile: PerformanceProfile) -> int:
    """GPUs one worker counts for: its TP size, 1 for a CPU worker."""
    return max(1, profile.gpus_per_worker)


def _tensor_parallel(profile: PerformanceProfile) -> str:
    return f"x{gpus_of(profile)}" if gpus_of(profile) > 1 else ""


Line = tuple[Split, ...]
"""Splits of one kind, in order of prefill workers: neighbours differ by a small step."""


def split_lines(
    prefill_profiles: Sequence[PerformanceProfile],
    decode_profiles: Sequence[PerformanceProfile],
    num_gpus: int,
) -> tuple[Line, ...]:
    """All splits to which no worker can be added, by kind of worker.

    Two profiles pair if they hold KV alike. Each profile that may do both also makes a line of one split
    without prefill workers; it stands alone because it is no small step away from one prefill worker.

    Returns:
        Lines that are not empty; none if the budget is too small for any split.

    Raises:
        core.errors.ConfigError: the profiles do not go together.
    """
    check_profiles(prefill_profiles, decode_profiles)
    lines = [
        _line(prefill, decode, num_gpus)
        for prefill in prefill_profiles
        for decode in decode_profiles
        if _pairs(prefill, decode)
    ]
    for profile in decode_profiles:
        num_workers = num_gpus // gpus_of(profile)
        if profile in prefill_profiles and num_workers:
            lines.append(
                (
                    Split(
                        prefill_profile=profile, num_prefill=0, decode_profile=profile, num_decode=num_workers
                    ),
                )
            )
    return tuple(line for line in lines if line)


def _line(prefill: PerformanceProfile, decode: PerformanceProfile, num_gpus: int) -> Line:
    line: list[Split] = []
    for num_prefill in range(1, num_gpus // gpus_of(prefill) + 1):
        num_decode = (num_gpus - num_prefill * gpus_of(prefill)) // gpus_of(decode)
        if not num_decode:
            break
        if line and line[-1].num_decode == num_decode:
            line.pop()  # the same with one prefill worker more is better
        line.append(
            Split(
                prefill_profile=prefill,
                num_prefill=num_prefill,
                decode_profile=decode,
                num_decode=num_decode,
            )
        )
    return tuple(line)


def _pairs(prefill: PerformanceProfile, decode: PerformanceProfile) -> bool:
    return (prefill.kv_bytes_per_token, prefill.block_size_tokens) == (
        decode.kv_bytes_per_token,
        decode.block_size_tokens,
    )


def check_profiles(
    prefill_profiles: Sequence[PerformanceProfile], decode_profiles: Sequence[PerformanceProfile]
) -> None:
    """
    Raises:
        core.errors.ConfigError: a role has no profile, two have one name, or they are of several models.
    """
    for role, profiles in (("prefill", prefill_profiles), ("decode", decode_profiles)):
        if not profiles:
            raise ConfigError(f"there is no {role} profile: give at least one")
    by_name: dict[str, PerformanceProfile] = {}
    for profile in (*prefill_profiles, *decode_profiles):
        if by_name.setdefault(profile.name, profile) != profile:
            raise ConfigError(f"two unlike profiles are named {profile.name!r}: rename one")
    models = sorted({profile.model for profile in by_name.values()})
    if len(models) > 1:
        raise ConfigError(f"the profiles are of several models ({', '.join(models)}): plan one at a time")
    if not any(_pairs(prefill, decode) for prefill in prefill_profiles for decode in decode_profiles):
        raise ConfigError(
            "no prefill profile holds KV as a decode profile does: kv_bytes_per_token and "
            "block_size_tokens must be equal"
        )
