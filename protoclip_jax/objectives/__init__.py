"""The objectives: functions of arrays."""
