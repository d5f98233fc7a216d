"""Stand-in for TensorFlow, 600 MB that a PyTorch model does not need: what the HEAR tools touch when they import.

Both ask whether a model is a `tf.Module`; the kit also asks for a GPU where PyTorch sees one.
"""


class Module:
    """Never made: no model is an instance of it."""


class test:
    """The kit refuses to start where PyTorch sees a GPU and TensorFlow does not."""

    @staticmethod
    def is_gpu_available(*_args: object, **_options: object) -> bool:
        return True
