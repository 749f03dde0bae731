"""What `panel serve app/site.py --plugins app.plugin` needs besides the application: addresses, files and headers."""

from app import serve

serve.install()
serve.begin()

ROUTES = serve.routes()
