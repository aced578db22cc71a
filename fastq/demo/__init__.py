"""What `fastq demo` runs: two real networks, quantized and compared with float32."""

from fastq.demo.comparison import Comparison, compare, table
from fastq.demo.tasks import TASKS, Net, Task, efficientnet_lite0, lenet

__all__ = [
    "TASKS",
    "Comparison",
    "Net",
    "Task",
    "compare",
    "efficientnet_lite0",
    "lenet",
    "table",
]
