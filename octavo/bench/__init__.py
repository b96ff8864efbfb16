"""Speed and memory of a model of random weights, beside what the machine itself can do."""

from octavo.bench.measure import BenchResult, run_bench
from octavo.bench.settings import BenchSettings

__all__ = ["BenchResult", "BenchSettings", "run_bench"]
