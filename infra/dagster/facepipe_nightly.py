"""A Dagster asset that `facepipe nightly` brings up to date, and its schedule: `dagster dev -f facepipe_nightly.py`.

facepipe has an environment of its own, so that its packages and Dagster's do not meet. Set these variables:

    FACEPIPE           path of the command, such as /srv/faces/.venv/bin/facepipe
    FACEPIPE_CONFIG    path of the night's config, such as /srv/faces/nightly.toml

Written for Dagster 1.13.
"""

import json
import os
import subprocess

from dagster import (
    AssetExecutionContext,
    Backoff,
    Definitions,
    Failure,
    MaterializeResult,
    RetryPolicy,
    ScheduleDefinition,
    asset,
    define_asset_job,
)

# Exit codes after which the same night would end in the same way: a mistake in the config, and too many bad images.
_NO_RETRY = {2: "the config is wrong", 3: "more images failed than night.max_failed allows; everything else is done"}


@asset(retry_policy=RetryPolicy(max_retries=3, delay=600, backoff=Backoff.EXPONENTIAL))
def face_gallery(context: AssetExecutionContext) -> MaterializeResult:
    """Bring the gallery of faces up to date. Every step resumes, so a retry goes on where the night stopped."""
    command = [os.environ.get("FACEPIPE", "facepipe"), "nightly", os.environ["FACEPIPE_CONFIG"], "--json", "--quiet"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        reason = _NO_RETRY.get(done.returncode, "see the log of the step")
        raise Failure(
            f"facepipe ended with {done.returncode}: {reason}", allow_retries=done.returncode not in _NO_RETRY
        )
    summary = json.loads(done.stdout)
    return MaterializeResult(
        metadata={
            "images": summary["images"],
            "failed": summary["failed"],
            "version": summary["version"],
            "steps": summary["steps"],
        }
    )


nightly = define_asset_job("facepipe_nightly", selection=[face_gallery])
definitions = Definitions(
    assets=[face_gallery], jobs=[nightly], schedules=[ScheduleDefinition(job=nightly, cron_schedule="15 2 * * *")]
)
