"""stub"""


def add_page(app, settings, served):
    pass
