"""`python -m pallas_kernels.bench`: how fast every op is, beside what the machine allows and beside its peers.

Times are wall-clock seconds of calls that are enqueued one after another and waited for once (see `timing`); shares are
of the roofline: the least bytes and operations an op needs (see `work`), at the rates measured on the device.
"""
