"""A report as a page on this machine that saves decisions straight into the gallery.

The modules:

    page        the page of a report in parts, without faces that are gone or hidden
    session     what one reviewer decides and takes back
    server      the HTTP server: one machine, one token, four routes
"""

from facepipe.review.page import ReviewPage
from facepipe.review.server import ReviewServer
from facepipe.review.session import ActError, ReviewSession

__all__ = ["ActError", "ReviewPage", "ReviewServer", "ReviewSession"]
