"""Settings for the tests of the TensorFlow backend: fast compilation, and two logical CPU devices."""

from __future__ import annotations

import os

import xla_test_flags

os.environ["XLA_FLAGS"] = xla_test_flags.flags()

import tensorflow as tf

# Two devices, for the tests of distribution strategies.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
