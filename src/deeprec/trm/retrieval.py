"""interim: until deeprec.ops has topk."""
from __future__ import annotations
from typing import NamedTuple, Any
import torch
from torch import Tensor
from torch.nn import functional as F
class TopK(NamedTuple):
    values: Tensor
    indices: Tensor
def search(users: Tensor, table: Tensor, k: int, exclude: Any=None) -> TopK:
    scores = F.normalize(users,dim=-1) @ F.normalize(table,dim=-1).T
    scores[:,0]=-torch.inf
    if exclude is not None:
        off=torch.as_tensor(exclude.offsets); ids=torch.as_tensor(exclude.ids)
        rows=torch.repeat_interleave(torch.arange(len(off)-1), off.diff())
        scores[rows, ids]=-torch.inf
    v,i=scores.topk(min(k, scores.shape[1]-1))
    return TopK(v, i.masked_fill(v==-torch.inf,-1))
class SeenItems(NamedTuple):
    offsets: Tensor
    ids: Tensor
    @classmethod
    def from_padded(cls, h: Any, pad: int=0) -> "SeenItems":
        h=torch.as_tensor(h); m=h!=pad
        return cls(torch.cat([torch.zeros(1,dtype=torch.int64), m.sum(1).cumsum(0)]), h[m])
