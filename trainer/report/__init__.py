"""What a person gets: report.json, the published text report, curves and panel as PNG, report.html with all of it."""
