"""The ways to quantise a model, by name.

| scheme         | stored                                  | opened by          | source                    |
|----------------|-----------------------------------------|--------------------|---------------------------|
| `int8`         | int8, a scale for each row              | compressed-tensors | Jacob 2018, 1712.05877    |
| `int8_dynamic` | int8, a scale for each row; activations | bitsandbytes       | Dettmers 2022, 2208.07339 |
|                | become int8 as they come, row by row    |                    | Xiao 2023, 2211.10438     |
| `int4`         | int4, a scale for each group            | compressed-tensors |                           |
| `int4_qat`     | the same, trained with the error        | compressed-tensors | Jacob 2018, 1712.05877    |
| `nf4`          | NormalFloat4, double-quantised scales   | bitsandbytes       | Dettmers 2023, 2305.14314 |
"""

from typing import Literal

Scheme = Literal["int8", "int8_dynamic", "int4", "int4_qat", "nf4"]
BITS = {"int8": 8, "int4": 4, "int4_qat": 4}  # of the schemes that compressed-tensors opens
WITH_BITSANDBYTES = ("int8_dynamic", "nf4")
