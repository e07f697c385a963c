"""Where labels are computed: processes of this machine (`local`), or whatever Parsl reaches (`parsl`)."""

from bnn_driver.executors.local import LocalExecutor
from bnn_driver.executors.messages import frame_from_facts, frame_to_facts, receive, send

__all__ = ["LocalExecutor", "frame_from_facts", "frame_to_facts", "receive", "send"]
