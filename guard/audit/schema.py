"""The rows that an audit writes, one for each judged turn: those of a decision log, and where they come from."""

from collections.abc import Sequence

import pyarrow as pa

_WORD = pa.dictionary(pa.int32(), pa.string())
_REVISION = pa.struct([("name", pa.string()), ("revision", pa.string())])
_VIOLATION = pa.struct(
    [
        ("category", pa.string()),
        ("rule", pa.string()),
        ("action", pa.string()),
        ("score", pa.float64()),
        ("threshold", pa.float64()),
    ]
)


def schema(scores: Sequence[str], *, text: bool, compared: bool) -> pa.Schema:
    """`scores` are the names of the hazards and heads. Where the model could not answer, the struct of scores is null.

    `id` is that of the conversation, `turn` counts from 0 in it; `input` and `row` are its first row's. `characters`
    is the length of the text. `hits` are rules of the policy that match, also those not for this role. `metadata` is
    what policies ask for. `compare` is what the other policy says.
    """
    fields: list[tuple[str, pa.DataType]] = [
        ("id", pa.string()),
        ("turn", pa.int32()),
        ("input", _WORD),
        ("row", pa.int64()),
        ("role", _WORD),
        ("time", pa.timestamp("us", "UTC")),
        ("language", _WORD),
        ("source", _WORD),
        ("metadata", pa.map_(pa.string(), pa.string())),
        ("characters", pa.int32()),
        *([("text", pa.string())] if text else []),
        (
            "scores",
            pa.struct([("unsafe", pa.float32()), ("hazards", pa.struct([(name, pa.float32()) for name in scores]))]),
        ),
        ("hits", pa.list_(pa.string())),
        ("action", _WORD),
        ("violations", pa.list_(_VIOLATION)),
        ("coverage", pa.struct([("seen", pa.int32()), ("total", pa.int32())])),
        ("degraded", pa.bool_()),
        ("shadow", pa.bool_()),
        ("policy", _REVISION),
        ("model", _REVISION),
        *(
            [
                (
                    "compare",
                    pa.struct([("policy", _REVISION), ("action", pa.string()), ("violations", pa.list_(_VIOLATION))]),
                )
            ]
            if compared
            else []
        ),
    ]
    return pa.schema(fields)
