"""What is in force: the policies of a directory, read again when it changes, and candidates tried beside them.

Every change is built whole, beside what is in force, and then takes its place at once; where anything is wrong, what
was in force stays. Changes are made one at a time.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from guard.errors import ConfigError, InputError, Loading, NotFound, PolicyError
from guard.policy.bundle import Signatures
from guard.policy.compile import Policy
from guard.policy.document import read_file
from guard.policy.rollout import Candidate, Flip, flips, unfit
from guard.policy.store import PolicyStore, held_policy, load_policy
from guard.service import files
from guard.service.judge import Judge
from guard.settings import Settings
from guard.telemetry import Telemetry
from guard.types import Decision, Revision


class Version(NamedTuple):
    """A revision, and the content of its file where that is known."""

    policy: Policy
    content: bytes | None


@dataclass(frozen=True, slots=True)
class _Pin:
    """A revision that is in force in place of the one on disk, as long as the disk has that one; and why it has."""

    version: Version
    over: str
    reason: str = ""


@dataclass(slots=True)
class Tally:
    """What came of judging twice: verdicts, those of them that the candidate gave, and what differs."""

    verdicts: int = 0
    answered: int = 0
    flips: Counter[Flip] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Standing:
    """How a policy stands; `expires_in` is in seconds. `difference` tells why it is not that of its file."""

    policy: Policy
    previous: str
    difference: str
    candidate: Candidate | None
    expires_in: float
    tally: Tally


class Rollout:
    """Refuses with Loading until it is started; `clock` gives Unix seconds."""

    def __init__(self, settings: Settings, telemetry: Telemetry, clock: Callable[[], float] = time.time) -> None:
        self._directory = settings.policies
        self._default = settings.default_policy
        self._signatures = Signatures(settings.policies_key) if settings.policies_key else None
        self._every = settings.policies_poll_seconds
        self._log = telemetry.log
        self._metrics = telemetry.metrics
        self._clock = clock
        self._judge: Judge | None = None
        self._changing = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._seen: Mapping[str, files.Stamp] = files.stamps(self._directory)
        self._disk: PolicyStore | None = None  # as it was last read without problems
        self._problems: list[str] = []  # that it has now
        self._pins: dict[str, _Pin] = {}
        self._previous: dict[str, Version] = {}
        self._tallies: dict[Revision, Tally] = {}

    def start(self, judge: Judge) -> None:
        """With a judge that has the policies of the directory."""
        self._judge, self._disk = judge, judge.policies
        self._tell()

    def stop(self) -> None:
        """Ends `watch`."""
        self._stopping.set()

    @property
    def policies(self) -> PolicyStore:
        """What is in force now."""
        self._drop_expired()
        return self.judge.policies

    @property
    def judge(self) -> Judge:
        if self._judge is None:
            raise Loading
        return self._judge

    @property
    def differences(self) -> list[str]:
        """In what the policies in force are not those of the directory, and why; a line each."""
        return [*self._problems, *(f"policy {name}: {self._difference(name)}" for name in sorted(self._pins))]

    def standing(self, name: str) -> Standing:
        """How the policy of that name stands. Raises NotFound."""
        policies = self.policies
        live = policies.get(name)
        previous, candidate = self._previous.get(live.name), policies.candidates.get(live.name)
        return Standing(
            live,
            previous.policy.revision if previous else "",
            self._difference(live.name),
            candidate,
            candidate.expires - self._clock() if candidate else 0.0,
            self._tallies[_key(candidate.policy)] if candidate else Tally(),
        )

    def decided(self, decision: Decision) -> None:
        """Counts what the two revisions of a roll-out differ in."""
        beside = decision.beside
        if beside is None:
            return
        given, other = (decision.policy, decision.verdicts), (beside.policy, beside.verdicts)
        (_, live), (revision, candidate) = (given, other) if beside.is_candidate else (other, given)
        labels = revision.name, revision.revision
        tally = self._tallies.get(revision, Tally())  # it may be gone since
        tally.verdicts += len(candidate)
        tally.answered += 0 if beside.is_candidate else len(candidate)
        by = "live" if beside.is_candidate else "candidate"
        self._metrics.candidate_verdicts.labels(*labels, by).inc(len(candidate))
        for was, becomes in zip(live, candidate, strict=True):
            for flip in flips(was, becomes):
                tally.flips[flip] += 1
                actions = flip.live.name.lower(), flip.candidate.name.lower()
                self._metrics.candidate_flips.labels(*labels, flip.about, *actions).inc()

    async def watch(self) -> None:
        """Reads the directory again whenever it changes, and drops what has expired, until `stop`."""
        async for changed in files.changes(self._directory, self._every, self._stopping):
            self._drop_expired()
            if changed or await self._look() != self._seen:
                async with self._changing:
                    await self._reload()

    async def stage(
        self, name: str, content: bytes, includes: Mapping[str, bytes], percent: float, seconds: float
    ) -> Standing:
        """Puts a candidate beside a policy, in place of the one that is there; it answers `percent` of conversations.

        Raises PolicyError with every problem of the files, NotFound, and InputError where the two cannot stand so, or
        where policies must be signed.
        """
        if self._signatures is not None:
            raise InputError("policy", "this server takes signed policies alone, from its directory")
        async with self._changing:
            live = self.policies.get(name)
            given = {**includes, f"{live.name}.yaml": content}
            policy = await asyncio.to_thread(held_policy, live.name, given, self._directory, self.judge.calibration)
            if reason := unfit(policy, live):
                raise InputError("policy", reason)
            candidate = Candidate(policy, percent, self._clock() + seconds, content)
            await self._put([*self._candidates(but=live.name), candidate])
            self._log.info("policy_staged", **_named(policy), percent=percent, seconds=seconds)
            return self.standing(live.name)

    async def promote(self, name: str, revision: str) -> Standing:
        """Puts a candidate in force and on disk; `revision` is how its own begins. Raises NotFound."""
        async with self._changing:
            candidate = self._candidate(name, revision)
            self._log.info("policy_promoted", **_named(candidate.policy))
            return await self._pin(Version(candidate.policy, candidate.content))

    async def withdraw(self, name: str, revision: str) -> Standing:
        """Takes a candidate away; `revision` is how its own begins. Raises NotFound."""
        async with self._changing:
            candidate = self._candidate(name, revision)
            await self._put(self._candidates(but=candidate.policy.name))
            self._log.info("policy_withdrawn", **_named(candidate.policy))
            return self.standing(name)

    async def rollback(self, name: str) -> Standing:
        """Puts the revision in force and on disk that was before the live one. Raises NotFound where there is none."""
        async with self._changing:
            live = self.policies.get(name)
            if (previous := self._previous.get(live.name)) is None:
                raise NotFound("policy", f"no other revision of {live.name} was in force since the start")
            self._log.info("policy_rolled_back", **_named(previous.policy))
            return await self._pin(previous)

    async def _reload(self) -> None:
        self._seen = await self._look()
        found: PolicyStore | Exception
        try:
            found = await asyncio.to_thread(
                PolicyStore.load,
                self._directory,
                self._default,
                self.judge.calibration,
                self._signatures,
                self._disk,
            )
        except Exception as error:  # of any kind, as the watching must outlive it
            found = error
        if await self._look() != self._seen:  # it was written to meanwhile, and will be read again
            return
        before = _revisions(self.judge.policies)
        try:
            if isinstance(found, Exception):
                raise found
            await self._put(self._candidates(), disk=found)
        except Exception as error:
            is_ours = not isinstance(error, ConfigError)
            self._problems = ["a fault of Guard's, which its log tells"] if is_ours else str(error).splitlines()
            self._log.error("policies_kept", problems=self._problems, exc_info=error if is_ours else None)
            self._tell("refused")
            return
        self._problems = []
        after = _revisions(self.judge.policies)
        if changed := sorted(name for name in before | after if before.get(name) != after.get(name)):
            self._log.info("policies_reloaded", policies=len(after), changed=changed)
        self._tell("changed" if changed else "unchanged")

    async def _pin(self, version: Version) -> Standing:
        """Puts a revision in force whatever is on disk, and then there."""
        name = version.policy.name
        await self._put(self._candidates(but=name), pinned=version)
        reason = await asyncio.to_thread(self._write, version)
        if not reason:
            await self._reload()
        elif name in self._pins:
            self._pins[name] = replace(self._pins[name], reason=reason)
            self._log.warning("policy_not_written", **_named(version.policy), reason=reason)
        return self.standing(name)

    async def _put(
        self, candidates: Sequence[Candidate], *, disk: PolicyStore | None = None, pinned: Version | None = None
    ) -> None:
        """Puts in force what is on disk, save where pins hold, and beside it those of the candidates that still fit."""
        disk = disk or self._on_disk
        before = {policy.name: self._version(policy) for policy in self.judge.policies.policies}
        pins = dict(self._pins)
        if pinned is not None:
            name = pinned.policy.name
            pins[name] = _Pin(pinned, disk.get(name).revision)
        on_disk = _revisions(disk)
        pins = {name: pin for name, pin in pins.items() if on_disk.get(name) == pin.over != pin.version.policy.revision}
        live = disk.by_name | {name: pin.version.policy for name, pin in pins.items()}
        reasons = [unfit(candidate.policy, live.get(candidate.policy.name)) for candidate in candidates]
        fitting = [candidate for candidate, reason in zip(candidates, reasons, strict=True) if not reason]
        await self.judge.adopt(PolicyStore(live.values(), disk.default, fitting, disk.files, disk.signed))
        self._disk, self._pins = disk, pins
        self._previous |= {
            name: version
            for name, version in before.items()
            if name in live and live[name].revision != version.policy.revision
        }
        for candidate, reason in zip(candidates, reasons, strict=True):
            if reason:
                self._log.info("policy_dropped", **_named(candidate.policy), reason=reason)
        self._tell()

    def _write(self, version: Version) -> str:
        """Puts a revision into its file; tells why, where it does not."""
        policy, content = version
        path = self._directory / f"{policy.name}.yaml"
        if content is None:
            return "its file is not known"
        if self._signatures is not None:
            return "the directory is signed"
        if path.is_symlink():
            return f"{path} is a link"

        def read(other: Path, limit: int) -> bytes:
            return content if other == path else read_file(other, limit)

        try:
            if load_policy(path, self.judge.calibration, read).revision != policy.revision:
                return "it includes what is otherwise on disk"
            files.replace(path, content)
        except PolicyError:
            return "it includes what is not on disk"
        except OSError as error:
            return f"{path} cannot be written: {error.strerror}"
        return ""

    def _drop_expired(self) -> None:
        """Of the candidates; at once, as it makes nothing new."""
        policies, now = self.judge.policies, self._clock()
        lasting = [candidate for candidate in policies.candidates.values() if candidate.expires > now]
        if len(lasting) < len(policies.candidates):
            for candidate in policies.candidates.values():
                if candidate not in lasting:
                    self._log.info("policy_dropped", **_named(candidate.policy), reason="it has expired")
            self.judge.policies = PolicyStore(
                policies.policies, policies.default, lasting, policies.files, policies.signed
            )
            self._tell()

    def _tell(self, outcome: str = "") -> None:
        """Brings metrics and tallies up to date; `outcome` is that of a reload."""
        policies, metrics = self.judge.policies, self._metrics
        if outcome:
            metrics.policy_reloads.labels(outcome).inc()
        metrics.policies_differ.set(bool(self.differences))
        metrics.policy_info.clear()
        candidates = [candidate.policy for candidate in policies.candidates.values()]
        for stage, revisions in (("live", policies.policies), ("candidate", candidates)):
            for policy in revisions:
                metrics.policy_info.labels(policy.name, policy.revision, stage).set(1)
        self._tallies = {_key(policy): self._tallies.get(_key(policy), Tally()) for policy in candidates}

    def _candidates(self, but: str = "") -> list[Candidate]:
        """Those in force, without that of one policy."""
        return [candidate for name, candidate in self.policies.candidates.items() if name != but]

    def _candidate(self, name: str, revision: str) -> Candidate:
        policies = self.policies
        live = policies.get(name)
        candidate = policies.candidates.get(live.name)
        if candidate is None:
            raise NotFound("policy", f"{live.name} has no candidate")
        if not candidate.policy.revision.startswith(revision):
            raise NotFound("revision", f"the candidate of {live.name} is {candidate.policy.revision}")
        return candidate

    def _version(self, policy: Policy) -> Version:
        """Of a policy in force."""
        if policy.name in self._pins:
            return self._pins[policy.name].version
        return Version(policy, self._on_disk.files.get(f"{policy.name}.yaml"))

    def _difference(self, name: str) -> str:
        if (pin := self._pins.get(name)) is None:
            return ""
        reason = f": {pin.reason}" if pin.reason else ""
        return f"{pin.version.policy.revision} is live and {pin.over} on disk{reason}"

    @property
    def _on_disk(self) -> PolicyStore:
        if self._disk is None:
            raise Loading
        return self._disk

    async def _look(self) -> Mapping[str, files.Stamp]:
        return await asyncio.to_thread(files.stamps, self._directory)


def _revisions(policies: PolicyStore) -> dict[str, str]:
    return {policy.name: policy.revision for policy in policies.policies}


def _key(policy: Policy) -> Revision:
    return Revision(policy.name, policy.revision)


def _named(policy: Policy) -> dict[str, str]:
    return {"policy": policy.name, "revision": policy.revision}
