import sys,traceback,glob,collections
from sftmix.data.read import read_rows
import shutil,os
for f in sorted(glob.glob("/tmp/t/fz/failed-*")):
    g="/tmp/t/fz2/"+f.split("-",3)[3]; os.makedirs("/tmp/t/fz2",exist_ok=True); shutil.copy(f,g)
    print("==",f, open(f,"rb").read()[:150]); r=[]
    try:
        for x in read_rows(g,on_skip=lambda a,b:0): r.append(x)
    except ValueError as e: print("VE",e)
    except Exception: traceback.print_exc(limit=-3)
    c=collections.Counter(x.place for x in r)
    print([(x.place[12:],str(x)[-120:]) for x in r if c[x.place]>1][:4])
