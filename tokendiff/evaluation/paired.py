"""Two evaluations of the same rows, held against each other row by row.

Rows differ far more from one another than two models differ on a row. Both evaluations use the same
noise for a row, since its id and the seed decide the noise. Whatever a row adds to both evaluations
cancels in their difference, so the paired standard error of the difference is much smaller than the
standard error of either mean.

An evaluation keeps its figures by row in Parquet files beside its metrics. Rows are taken as
independent, as in `evaluation.bound` and `evaluation.acceptance`: for rows cut from few documents,
or many samples of few prompts, the standard error is too small. With fewer than about 20 rows the
standard error is itself uncertain: use Student's quantiles for the difference, which are wider.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tokendiff.artifacts.locations import Location, open_binary
from tokendiff.artifacts.manifest import load_manifest, sha256_of, write_atomically
from tokendiff.config.evaluate import PAIRED_METRICS, is_task_metric
from tokendiff.errors import CorruptFileError, InputError

ROWS, SAMPLED_ROWS = "rows.parquet", "sampled_rows.parquet"
DOCUMENTS = "documents"  # the folder of a file per task
ROW_ID, COUNT = "row_id", "count"

_ROUNDING = 1e-12  # share of a difference, below which its standard error is 0

Rows = Mapping[str, np.ndarray]  # columns [n]; one of them ROW_ID


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A metric that is a function of a ratio of sums over rows.

    Attributes:
        file: which of an evaluation's files has the two columns.
        slope: derivative of the metric by the ratio.
    """

    file: str
    numerator: str
    denominator: str
    slope: Callable[[float], float] = lambda ratio: 1.0

    def value(self, rows: Rows) -> float:
        """The ratio."""
        return float(rows[self.numerator].sum() / rows[self.denominator].sum())

    def influence(self, rows: Rows) -> np.ndarray:
        """[n] what each row moves the metric by, to first order, times n; they sum to 0."""
        y, x = rows[self.numerator], rows[self.denominator]
        ratio = y.sum() / x.sum()
        influence: np.ndarray = self.slope(float(ratio)) * (y - ratio * x) / x.mean()
        return influence


RATIOS = {
    "nats_per_token": Ratio(file=ROWS, numerator="nats", denominator="num_tokens"),
    "bits_per_byte": Ratio(
        file=ROWS,
        numerator="nats",
        denominator="num_bytes",
        slope=lambda nats: 1.0 / math.log(2.0),
    ),
    "perplexity": Ratio(
        file=ROWS,
        numerator="nats",
        denominator="num_tokens",
        slope=lambda nats: math.exp(min(nats, 700.0)),
    ),
    "ar_nats_per_token": Ratio(file=ROWS, numerator="ar_nats", denominator="ar_tokens"),
    "expected_acceptance_length": Ratio(
        file=ROWS, numerator="num_accepted", denominator="num_blocks"
    ),
    "acceptance_length_mean": Ratio(
        file=SAMPLED_ROWS, numerator="num_accepted", denominator="num_blocks"
    ),
    "tokens_per_target_forward": Ratio(
        file=SAMPLED_ROWS, numerator="num_new_tokens", denominator="num_model_calls"
    ),
}
assert set(RATIOS) == set(PAIRED_METRICS)


def ratio_of(metric: str) -> Ratio | None:
    """The columns that a metric is computed from. A task's figure, TASK/METRIC, is a mean over
    documents. None where an evaluation keeps no rows for the metric.
    """
    if is_task_metric(metric):
        return Ratio(file=documents_file(metric), numerator=metric, denominator=COUNT)
    return RATIOS.get(metric)


def documents_file(metric: str) -> str:
    """The file of an evaluation that has a task's metrics by document."""
    return f"{DOCUMENTS}/{metric.partition('/')[0]}.parquet"


def paired_standard_error(metric: str, rows: Rows, others: Rows) -> float:
    """The standard error of the difference of a metric between two evaluations of the same rows.

    A ratio of sums R = sum y / sum x deviates from its limit, to first order, by the mean over rows
    of e_i = (y_i - R x_i) / mean(x), and a function g of it by that of g'(R) e_i (delta method). So
    the difference of two evaluations, of the same n rows, is a mean over rows of

        d_i = g'(R) (y_i - R x_i) / mean(x)  -  g'(R') (y'_i - R' x'_i) / mean(x'),

    and its standard error is the standard deviation of d_i over sqrt(n). What a row does to both
    evaluations alike is in neither d_i nor their deviation. Of one evaluation alone it is the
    standard error of `evaluation.bound.summarize`.

    Args:
        metric: one that `ratio_of` knows.
        rows, others: the columns of its file, in any order.

    Returns:
        infinite where nothing can be said: for a single row, and where all rows differ by the same
        amount (two answers right against two wrong), which has no deviation to tell chance by; nan
        where a figure is not finite.

    Raises:
        InputError: these are not the same rows.

    Source: Cochran, Sampling Techniques (3rd ed., 1977), chapter 6, ratio estimates and the
    comparison of two of them.
    """
    order, order_of_others = (np.argsort(side[ROW_ID], kind="stable") for side in (rows, others))
    ids, other_ids = rows[ROW_ID][order], others[ROW_ID][order_of_others]
    if not np.array_equal(ids, other_ids):
        common = len(np.intersect1d(ids, other_ids))
        raise InputError(
            f"{metric} cannot be compared row by row: the evaluations have {len(ids):,} and "
            f"{len(other_ids):,} rows, of which {common:,} are the same; evaluate both on the same "
            "data, split, seed and max_eval_rows, and samples of the same prompts"
        )
    if len(ids) < 2:
        return math.inf
    ratio = ratio_of(metric)
    assert ratio is not None
    with np.errstate(all="ignore"):  # what is not finite is said by the result
        influence = ratio.influence(rows)[order] - ratio.influence(others)[order_of_others]
        error = float(influence.std(ddof=1) / math.sqrt(len(influence)))
        difference = abs(ratio.value(rows) - ratio.value(others))
    return math.inf if error <= _ROUNDING * difference and difference > 0.0 else error


def write_rows(path: Location, columns: Rows) -> None:
    """Write a file of rows, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(dict(columns)), sink)
    write_atomically(path, sink.getvalue().to_pybytes())


def read_rows(folder: Location, metric: str) -> dict[str, np.ndarray] | None:
    """What a committed evaluation has by row of a metric; None where it has nothing.

    Raises:
        CorruptFileError: the file does not match the manifest.
    """
    import pyarrow.parquet as pq

    ratio = ratio_of(metric)
    entry = None if ratio is None else load_manifest(folder).files.get(ratio.file)
    if ratio is None or entry is None:
        return None
    path = folder / ratio.file
    if sha256_of(path) != entry["sha256"]:
        raise CorruptFileError(
            f"{folder}: {ratio.file} does not match its MANIFEST; evaluate again (--force)"
        )
    with open_binary(path) as file:
        table = pq.read_table(file)
    names = (ROW_ID, ratio.numerator, ratio.denominator)
    if not set(names) <= set(table.column_names):
        return None
    return {name: table.column(name).to_numpy() for name in names}
