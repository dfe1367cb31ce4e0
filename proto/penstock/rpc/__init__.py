"""Typed messages on grpcio: handlers, stubs, rich errors, TLS, health, reflection.

The client path (``channel``, ``stubs``, ``errors``, ``codec``, ``tls``) needs grpcio, grpcio-status and protobuf;
``health`` and ``reflection`` need their grpcio packages too and are imported by servers only.
"""

import penstock.v1 as v1  # before betterproto2 is imported by anybody: it says how
