from .errors import ArtefactError as ArtefactError
