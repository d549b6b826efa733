http://127.0.0.1:43521/nosuch: http://127.0.0.1:43521/nosuch: no config.json; not a transformers checkpoint (or give --config CONFIG) (and no model of that id is in the registry)
starting Ray …
[1/6] http://127.0.0.1:43521/nosuch parameters: failed: http://127.0.0.1:43521/nosuch: no config.json; not a transformers checkpoint (or give --config CONFIG) (and no model of that id is in the registry)
[2/6] http://127.0.0.1:43521/nosuch random: failed: http://127.0.0.1:43521/nosuch: no config.json; not a transformers checkpoint (or give --config CONFIG) (and no model of that id is in the registry)
[3/6] http://127.0.0.1:43521/nosuch trained: failed: http://127.0.0.1:43521/nosuch: no config.json; not a transformers checkpoint (or give --config CONFIG) (and no model of that id is in the registry)
http://127.0.0.1:43521/step0 parameters: loading
[4/6] http://127.0.0.1:43521/step0 parameters: layernorm, 0 zero scales in 5.0 s
http://127.0.0.1:43521/step0 random: loading
[5/6] http://127.0.0.1:43521/step0 random: layernorm, depth 14.86, alignment 1.0000 in 2.2 s
http://127.0.0.1:43521/step0 trained: loading
[6/6] http://127.0.0.1:43521/step0 trained: layernorm, depth 14.83, alignment 1.0000 in 0.4 s
