"""OpenVINO on a CPU: the engine, its compiled graphs, and int8.

OpenVINO's converter reports every conversion to Google Analytics unless a file in the user's home forbids it, and forks
the whole process for each report. Without the module `openvino_telemetry` it does neither, so it is kept from being
imported: None in `sys.modules` is how Python says that a module is not there. This has to come before the first import
of openvino.
"""

import sys

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # typeshed leaves None out
