"""An Airflow DAG that runs `facepipe nightly` every night. Copy it into Airflow's folder of DAGs.

facepipe has an environment of its own, so that its packages and Airflow's do not meet. Workers need these variables:

    FACEPIPE           path of the command, such as /srv/faces/.venv/bin/facepipe
    FACEPIPE_CONFIG    path of the night's config, such as /srv/faces/nightly.toml

Written for Airflow 3 (tested with apache-airflow-core 3.3).
"""

import os
import subprocess
from datetime import timedelta

import pendulum
from airflow.sdk import dag, task
from airflow.sdk.exceptions import AirflowFailException

# Exit codes after which the same night would end in the same way: a mistake in the config, and too many bad images.
_NO_RETRY = {2: "the config is wrong", 3: "more images failed than night.max_failed allows; everything else is done"}


@dag(
    schedule="15 2 * * *",
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    catchup=False,  # one night does the work of all that were missed
    max_active_runs=1,  # a second night on the same gallery would be refused
)
def facepipe_nightly():
    """Bring a gallery up to date."""

    @task(retries=3, retry_delay=timedelta(minutes=10), execution_timeout=timedelta(hours=12))
    def run_night() -> None:
        """Run the night. Every step resumes, so a retry goes on where the night stopped."""
        command = [os.environ.get("FACEPIPE", "facepipe"), "--log-format", "json"]
        # Airflow stops a task by SIGTERM to its process group: facepipe commits what is finished.
        done = subprocess.run([*command, "nightly", os.environ["FACEPIPE_CONFIG"], "--quiet"], check=False)
        if done.returncode in _NO_RETRY:
            raise AirflowFailException(f"facepipe ended with {done.returncode}: {_NO_RETRY[done.returncode]}")
        done.check_returncode()

    run_night()


facepipe_nightly()
