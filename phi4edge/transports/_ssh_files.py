def push(*a): raise NotImplementedError
def pull(*a): raise NotImplementedError
