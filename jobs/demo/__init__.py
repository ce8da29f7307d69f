"""A gallery from real photos, with damaged and duplicated copies among them: `python -m jobs.demo OUT`."""
