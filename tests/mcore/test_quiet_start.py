"""The warnings that libraries print at every start are hidden, and no others."""

import logging

from megatron_paint.mcore.ranks import _silence_known_warnings


def test_only_the_known_line_of_cpp_extension_is_hidden(caplog):
    _silence_known_warnings()
    logger = logging.getLogger("torch.utils.cpp_extension")
    logger.addHandler(caplog.handler)
    try:
        logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local/cuda")
        logger.warning("another warning")
    finally:
        logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"another warning"}
