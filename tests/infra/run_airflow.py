"""Imports the DAG and runs its task, in the environment of Airflow: run by tests/test_orchestrators.py.

python run_airflow.py DAG_FILE
"""

import importlib.util
import json
import sys

from airflow.sdk.exceptions import AirflowFailException

spec = importlib.util.spec_from_file_location("dag_file", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
dag = module.facepipe_nightly()
(task,) = dag.tasks
try:
    task.python_callable()
    end = "done"
except AirflowFailException as error:
    end = f"failed for good: {error}"
except Exception as error:
    end = f"to be tried again: {type(error).__name__}"
figures = {"dag": dag.dag_id, "schedule": dag.schedule, "max_active_runs": dag.max_active_runs, "retries": task.retries}
print(json.dumps({**figures, "end": end}))
