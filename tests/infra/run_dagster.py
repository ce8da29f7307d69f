"""Materialises the asset and loads the schedule, in the environment of Dagster: run by tests/test_orchestrators.py.

python run_dagster.py DEFINITIONS_FILE
"""

import importlib.util
import json
import sys

from dagster import DagsterInstance, materialize

spec = importlib.util.spec_from_file_location("definitions_file", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
schedules = [schedule.cron_schedule for schedule in module.definitions.schedules]
with DagsterInstance.ephemeral() as instance:
    result = materialize([module.face_gallery], instance=instance, raise_on_error=False)
    metadata = {}
    if result.success:
        (materialization,) = result.asset_materializations_for_node("face_gallery")
        metadata = {name: value.value for name, value in materialization.metadata.items()}
    retried = any(event.event_type_value == "STEP_UP_FOR_RETRY" for event in result.all_events)
print(json.dumps({"schedules": schedules, "success": result.success, "retried": retried, "metadata": metadata}))
