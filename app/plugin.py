"""What `panel serve app/site.py --plugins app.plugin` needs besides the application: addresses, files and headers."""

import logging

from app import serve

if trouble := serve.check_redis():
    logging.getLogger(__name__).warning(trouble)
serve.install()
serve.begin()

ROUTES = serve.routes()
