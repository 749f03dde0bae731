"""The application that `panel serve app/site.py --plugins app.plugin` runs for each visitor, and Jupyter's preview."""

from bokeh.io import curdoc

from app import notebook, serve

if serve.is_asked(curdoc()):
    serve.fill(curdoc())
else:
    notebook.index(curdoc())
