"""The application that `panel serve app/site.py --plugins app.plugin` runs for each visitor."""

from bokeh.io import curdoc

from app.serve import fill

fill(curdoc())
