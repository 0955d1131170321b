"""What the operators that train small networks share: their table, their passes and their steps."""

from fastws.small_cnn.table import layer_table

__all__ = ["layer_table"]
