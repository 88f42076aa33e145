"""Runs the tests of one module and prints what became of each, as a line of JSON."""

import importlib
import json
import sys
import time
import traceback
import unittest


class Report(unittest.TestResult):
    def startTest(self, test):
        super().startTest(test)
        self.began = time.monotonic()
        self.faults = []

    def addError(self, test, err):
        self.fault(err)

    def addFailure(self, test, err):
        self.fault(err)

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self.faults.append(subtest._subDescription())
            self.fault(err)

    def addSkip(self, test, reason):
        self.faults.append("skipped: " + reason)

    def addExpectedFailure(self, test, err):
        self.faults.append("is expected to fail")

    def addUnexpectedSuccess(self, test):
        self.faults.append("is expected to fail")

    def fault(self, err):
        self.faults.append("".join(traceback.format_exception(*err)))

    def stopTest(self, test):
        line = {
            "test": ".".join(test.id().split(".")[1:]),
            "seconds": time.monotonic() - self.began,
            "fault": "\n".join(self.faults),
        }
        print(json.dumps(line), flush=True)


module = importlib.import_module(sys.argv[1])
unittest.defaultTestLoader.loadTestsFromModule(module).run(Report())
