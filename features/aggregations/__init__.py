"""Every aggregation, one file each."""

from features.aggregations.base import Aggregation, Measure, Slot, SlotTotals, Table
from features.aggregations.count import Count
from features.aggregations.decayed import Decayed
from features.aggregations.delta import Delta
from features.aggregations.distinct import Distinct
from features.aggregations.entropy import Entropy
from features.aggregations.first import First
from features.aggregations.first_k import FirstK
from features.aggregations.last import Last
from features.aggregations.last_k import LastK
from features.aggregations.max import Max
from features.aggregations.mean import Mean
from features.aggregations.min import Min
from features.aggregations.quantile import Quantile
from features.aggregations.rate import Rate
from features.aggregations.ratio import Ratio
from features.aggregations.seconds_since import SecondsSince
from features.aggregations.sequence import Sequence
from features.aggregations.since_first import SinceFirst
from features.aggregations.std import Std
from features.aggregations.sum import Sum
from features.aggregations.top_k import TopK

AnyAggregation = (
    Count
    | Sum
    | Mean
    | Min
    | Max
    | Std
    | Ratio
    | Distinct
    | Last
    | LastK
    | Sequence
    | SecondsSince
    | First
    | FirstK
    | SinceFirst
    | Decayed
    | Rate
    | Delta
    | TopK
    | Entropy
    | Quantile
)

__all__ = [
    "Aggregation",
    "AnyAggregation",
    "Count",
    "Decayed",
    "Delta",
    "Distinct",
    "Entropy",
    "First",
    "FirstK",
    "Last",
    "LastK",
    "Max",
    "Mean",
    "Measure",
    "Min",
    "Quantile",
    "Rate",
    "Ratio",
    "SecondsSince",
    "Sequence",
    "SinceFirst",
    "Slot",
    "SlotTotals",
    "Std",
    "Sum",
    "Table",
    "TopK",
]
