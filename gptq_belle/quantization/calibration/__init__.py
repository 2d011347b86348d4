"""Calibration data: files of any form become rows of tokens; evaluation text that was calibrated on is refused."""
