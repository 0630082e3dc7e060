"""Interim."""


class Legacy:
    victim = property(lambda self: self.session.victim)
    masked_victim = property(lambda self: self.session.masked)
    figures = property(lambda self: self.session.figures)
    initial_figures = property(lambda self: self.session.initial_figures)
    pruned = property(lambda self: self.session.state.pruned)
    changes = property(lambda self: list(self.session.state.changes))
    exhausted = property(lambda self: self.session.exhausted)
    least_acc = property(lambda self: self.session.least_acc)

    def evaluate_also(self, units):
        return self.session.peek(units)

    def clean_also(self, units):
        return self.session.peek_clean(units)

    def suspect_also(self, units):
        return self.session.peek_danger(units)

    def too_dear(self):
        return self.session.state.over_budget

    def suspected_fall(self, n):
        return self.session.suspected_fall(n)

    def give_back(self, unit):
        return self.session.restore(unit, self.worth)

    def snapshot(self):
        from ..rendering.drawing import Snapshot

        return Snapshot.of(self.session)
