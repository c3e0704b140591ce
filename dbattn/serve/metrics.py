"""Metrics: counts and times of what was served, in Prometheus' text format."""

import threading
from bisect import bisect_left
from collections import Counter
from itertools import accumulate
from typing import Any

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Histogram:
    """How many values were at most as large as each bound."""

    def __init__(self) -> None:
        self._counts, self._sum = [0] * (len(SECONDS) + 1), 0.0

    def add(self, value: float) -> None:
        """Count one."""
        self._counts[bisect_left(SECONDS, value)] += 1
        self._sum += value

    def lines(self, name: str) -> list[str]:
        """Samples under this name."""
        bounds = [*map(str, SECONDS), "+Inf"]
        below = list(accumulate(self._counts))
        found = [f'{name}_bucket{{le="{bound}"}} {count}' for bound, count in zip(bounds, below, strict=True)]
        return [*found, f"{name}_sum {self._sum:.6f}", f"{name}_count {below[-1]}"]


class Metrics:
    """What a server counts; from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._tokens: Counter[str] = Counter(prompt=0, reused=0, generated=0)
        self._answers: Counter[str] = Counter(done=0, cancelled=0, failed=0)
        self._first_token, self._answer = Histogram(), Histogram()

    def note_request(self, path: str, status: int) -> None:
        """Count a request that was answered."""
        with self._lock:
            self._requests[path, status] += 1

    def note(self, generation: Any) -> None:
        """Count an answer that has ended."""
        with self._lock:
            self._answers[generation.outcome] += 1
            self._tokens["prompt"] += generation.prompt_tokens
            self._tokens["reused"] += generation.tokens_reused
            self._tokens["generated"] += generation.new_tokens
            if generation.first_token:
                self._first_token.add(generation.first_token - generation.began)
            self._answer.add(generation.ended - generation.began)

    def text(self, **gauges: float) -> str:
        """All of it, and some figures of the moment, by name."""
        with self._lock:
            requests = {f'{{path="{path}",status="{status}"}}': n for (path, status), n in self._requests.items()}
            tokens = {f'{{kind="{kind}"}}': n for kind, n in self._tokens.items()}
            answers = {f'{{outcome="{outcome}"}}': n for outcome, n in self._answers.items()}
            first_token = self._first_token.lines("dbattn_first_token_seconds")
            answer = self._answer.lines("dbattn_answer_seconds")
        counts = {"requests": requests, "tokens": tokens, "answers": answers}
        helped = {
            "requests": "HTTP requests answered.",
            "tokens": "Tokens of prompts (contexts included), those whose rows were there already, and generated ones.",
            "answers": "Answers that have ended.",
        }
        lines = []
        for name, values in counts.items():
            lines += [f"# HELP dbattn_{name}_total {helped[name]}", f"# TYPE dbattn_{name}_total counter"]
            lines += [f"dbattn_{name}_total{label} {value}" for label, value in values.items()]
        lines += ["# HELP dbattn_first_token_seconds From a request to its first token.",
                  "# TYPE dbattn_first_token_seconds histogram", *first_token,
                  "# HELP dbattn_answer_seconds From a request to its last token.",
                  "# TYPE dbattn_answer_seconds histogram", *answer]  # fmt: skip
        for name, value in gauges.items():
            lines += [f"# TYPE dbattn_{name} gauge", f"dbattn_{name} {value:g}"]
        return "\n".join(lines) + "\n"
