from .reading import (
    FORMATS as FORMATS,
    detect_format as detect_format,
    read_data as read_data,
    read_records as read_records,
)
