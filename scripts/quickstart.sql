-- A small shop: customers, what they paid, and what support wrote about them.
CREATE TABLE customers (
    id      int PRIMARY KEY,
    name    text NOT NULL,
    email   text NOT NULL UNIQUE,
    phone   text NOT NULL,
    born    date NOT NULL,
    country text NOT NULL
);
CREATE TABLE payments (
    id          int PRIMARY KEY,
    customer_id int NOT NULL REFERENCES customers,
    card_number text NOT NULL,
    amount      numeric(10, 2) NOT NULL CHECK (amount > 0),
    paid_at     timestamptz NOT NULL
);
CREATE TABLE support_notes (
    id          int PRIMARY KEY,
    customer_id int NOT NULL REFERENCES customers,
    note        text NOT NULL,
    written_at  timestamptz NOT NULL
);
INSERT INTO customers
SELECT g,
       first || ' ' || last,
       lower(first) || '.' || lower(last) || g || '@' || (ARRAY['example.com', 'example.org', 'mail.example'])[1 + g % 3],
       '+49 30 ' || lpad((g * 7919 % 10000000)::text, 7, '0'),
       date '1950-01-01' + (g * 7727 % 20000),
       (ARRAY['DE', 'FR', 'PL', 'SE', 'PT'])[1 + g % 5]
FROM (SELECT g,
             (ARRAY['Ana', 'Bo', 'Carla', 'Dmitri', 'Eva', 'Farid', 'Greta', 'Hugo'])[1 + g % 8] AS first,
             (ARRAY['Novak', 'Silva', 'Weber', 'Larsen', 'Moreau', 'Kowalska', 'Berg'])[1 + g % 7] AS last
      FROM generate_series(1, 1000) g) names;
INSERT INTO payments
SELECT g, 1 + g * 31 % 1000, '4' || lpad((g::bigint * 982451653 % 1000000000000000)::text, 15, '0'),
       (5 + g * 37 % 40000) / 100.0 + 1, timestamptz '2026-01-01 08:00+00' + g * interval '37 minutes'
FROM generate_series(1, 5000) g;
INSERT INTO support_notes
SELECT g, 1 + g * 17 % 1000,
       (ARRAY['Asked for a refund of the last payment.', 'Could not log in after a change of e-mail.',
              'Complained about a late delivery.', 'Wants to close the account.'])[1 + g % 4],
       timestamptz '2026-02-01 09:00+00' + g * interval '3 hours'
FROM generate_series(1, 300) g;
ANALYZE;
