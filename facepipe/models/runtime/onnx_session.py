"""ONNX Runtime sessions: on CPUs ONNX Runtime runs graphs faster than torch runs modules."""

from typing import Any

import numpy.typing as npt

from facepipe.errors import ModelError


def open_session(graph: bytes, *, threads: int, device: str = "cpu", optimise: bool = True) -> Any:
    """Open an ONNX Runtime session with a fixed number of threads.

    A session never falls back to the CPU silently.

    Args:
        graph: The serialised ONNX model.
        threads: Threads within one operator.
        device: "cpu", "cuda" or "cuda:N".
        optimise: False computes every node exactly as the graph says, without fusion; slow.

    Raises:
        ModelError: The bytes are not a graph, or this ONNX Runtime cannot use the requested GPU.
    """
    import onnxruntime as ort

    provider = "CPUExecutionProvider" if device == "cpu" else "CUDAExecutionProvider"
    if provider not in ort.get_available_providers():
        raise ModelError(
            "this onnxruntime has no CUDA: pip install onnxruntime-gpu in its place, or run the model with device=cpu"
        )

    # Parallel within operators only, one operator at a time; errors are logged, warnings are not.
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # By default a GPU rounds the factors of convolutions to 10 bits, which moves vectors by up to 0.055.
    provider_options = {} if device == "cpu" else {"use_tf32": "0"}
    device_number = device.partition(":")[2]
    if device_number:
        provider_options["device_id"] = device_number
    try:
        session = ort.InferenceSession(graph, options, providers=[(provider, provider_options)])
    except Exception as error:  # ONNX Runtime's own exceptions share no base class but Exception
        raise ModelError(f"ONNX Runtime cannot load the graph: {str(error)[:300]}") from error
    # A session may start on the CPU without an error if the GPU's libraries do not load.
    if provider not in session.get_providers():
        raise ModelError(
            f"ONNX Runtime could not start {provider} and would run on the CPU: check that its CUDA and cuDNN are the "
            "ones that this onnxruntime-gpu was built with"
        )
    return session


class DeviceRun:
    """Runs of a session with inputs and outputs bound, so that each is copied once and all at a time."""

    def __init__(self, session: Any, device: str):
        """Prepare the runs.

        Args:
            session: A session with one input.
            device: "cpu", "cuda" or "cuda:N".
        """
        self._session = session
        self._kind = "cpu" if device == "cpu" else "cuda"
        self._number = int(device.partition(":")[2] or 0)

    def __call__(self, name: str, array: npt.NDArray[Any], output: str) -> npt.NDArray[Any]:
        """Run the session on one array, and return one output. Several threads may call it."""
        import onnxruntime as ort

        binding = self._session.io_binding()
        value = ort.OrtValue.ortvalue_from_numpy(array, self._kind, self._number)
        binding.bind_ortvalue_input(name, value)
        # The output stays on the device until the run has ended, and then comes back in one copy.
        binding.bind_output(output, self._kind, self._number)
        self._session.run_with_iobinding(binding)
        result: npt.NDArray[Any] = binding.copy_outputs_to_cpu()[0]
        return result
