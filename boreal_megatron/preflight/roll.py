"""How ranks tell rank 0 what they do and find: through torch's key-value store, so that it works while a collective
hangs, and rank 0 knows who is behind."""

import json
import os
import sys
import threading
import time
from dataclasses import asdict

from boreal_megatron.preflight.finding import Finding

INTERVAL = 0.2  # seconds between two looks
JOINING = "joining"  # what a rank does before the first check
WATCH = "silence"  # the check that rank 0 adds where somebody does not answer


class Roll:
    """One rank's entry: what it is doing, what it has found."""

    def __init__(self, store, rank, host):
        self.store, self.rank = store, rank
        self.said = {"host": host, "doing": JOINING, "done": 0, "over": False, "found": {}}
        self._say()

    def begin(self, check):
        self.said |= {"doing": check}
        self._say()

    def end(self, check, findings):
        self.said["found"][check] = [asdict(f) for f in findings]
        self.said["done"] += 1
        self._say()

    def over(self):
        self.said |= {"doing": "nothing more", "over": True}
        self._say()

    def _say(self):
        self.store.set(f"roll/{self.rank}", json.dumps(self.said))


class Watch(threading.Thread):
    """Rank 0's eye on all ranks, itself included; a thread, because its own main thread may be the one that hangs.

    Ends when every rank is through, or says the verdict and ends the process when some say nothing for `patience`
    seconds: torchrun then ends the other ranks.

    Args:
        store: a connection of its own; the main thread's may be waiting.
        conclude: ({rank: what `Roll` said, Findings restored}) -> exit code, after printing.
    """

    def __init__(self, store, world, patience, conclude):
        super().__init__(daemon=True)
        self.store, self.world, self.patience, self.conclude = store, world, patience, conclude
        self.answers, self.heard = {}, dict.fromkeys(range(world), time.monotonic())

    def run(self):
        texts = {}
        while not self.complete():
            for rank in range(self.world):
                key = f"roll/{rank}"
                if not self.store.check([key]):
                    continue
                text = self.store.get(key)
                if text != texts.get(rank):
                    texts[rank], self.answers[rank], self.heard[rank] = text, restore(text), time.monotonic()
            silent = [
                r for r, when in self.heard.items() if time.monotonic() - when > self.patience and not self.through(r)
            ]
            if silent:
                accuse(self.answers, silent, self.patience)
                code = self.conclude(self.answers)
                sys.stdout.flush()
                os._exit(code)
            time.sleep(INTERVAL)

    def complete(self):
        return all(self.through(rank) for rank in range(self.world))

    def through(self, rank):
        return rank in self.answers and self.answers[rank]["over"]


def accuse(answers, silent, patience):
    """Add a finding to every silent rank: those furthest behind keep the others waiting."""

    done = {rank: answers[rank]["done"] if rank in answers else -1 for rank in silent}
    for rank in silent:
        late = done[rank] == min(done.values())
        answer = answers.setdefault(rank, {"host": "host unknown", "doing": "starting", "found": {}})
        answer["found"][WATCH] = [
            Finding(
                "answer",
                False if late else None,
                f"nothing for {patience:g} s, in: {answer['doing']}",
                f"an answer within {patience:g} s",
                "look at this rank's stack (py-spy dump) and host; --timeout gives more time"
                if late
                else "waits for the others",
            )
        ]


def restore(text):
    said = json.loads(text)
    said["found"] = {check: [Finding(**f) for f in findings] for check, findings in said["found"].items()}
    return said
