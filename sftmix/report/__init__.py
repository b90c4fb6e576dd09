"""The pages of a run: report.html, one file without network, and those of several runs, `sftmix compare`."""
