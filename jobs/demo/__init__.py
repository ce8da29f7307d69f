"""A gallery from real photos, with damaged and duplicated copies among them: `python -m jobs.demo OUT`."""

import facepipe  # noqa: F401 - sets what OpenCV reads from the environment
